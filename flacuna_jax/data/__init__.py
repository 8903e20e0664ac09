"""From raw records to batches of packed rows."""

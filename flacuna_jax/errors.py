"""The one exception that means "the user's input is wrong"."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the file, line or key and says what to do. Verbs print it without a traceback and exit
    with status 2 (`flacuna_jax.cli.run_verb`); everything else that goes wrong exits with status 1.
    """

from flacuna_jax.cli import main

raise SystemExit(main())

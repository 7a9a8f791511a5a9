"""One file per stage; each has `main(cfg, options) -> RunResult`."""

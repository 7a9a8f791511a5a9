"""Data sets: files and the hub into rows (`rows`, `formats`), typed records (`records`), tokens (`templates`)."""

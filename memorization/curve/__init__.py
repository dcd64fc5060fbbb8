"""R_mem over |D| and over training: EMM, lines by factor, figures, tables."""

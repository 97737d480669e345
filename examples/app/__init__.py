"""A page in the browser: paint a layout, say what each colour is, see what a model makes of it."""

"""The `modelyard` command: one file per noun, loaded when it is asked for."""

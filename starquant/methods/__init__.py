"""Quantization methods: one file, or one folder, each.

To add a method: its options in `config/methods/`, its code here, one line in `config.methods.METHODS`, one YAML in
`conf/method/`. A variant of a method is one YAML that names its parent in `defaults` (docs/extending.md).
"""

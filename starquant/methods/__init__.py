"""Quantization methods: one file each, one line in `spec.METHODS`, one YAML in `conf/method/`.

Method files import nothing heavy at module level: their options are validated before torch is imported.
"""

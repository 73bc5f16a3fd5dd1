"""What each method can be asked, and the registry that names options and code of every method. No torch."""

from __future__ import annotations

from typing import Any

from starquant.config.methods.base import MethodOptions
from starquant.registry import Registry


class MethodRegistry(Registry[Any]):
    """Algorithms, each with where its options and its code live; `load` imports the code.

    Args:
        path: dotted config path that chooses from this registry, named in errors.
        targets: algorithm -> (options, code), 'module:attribute' each.
    """

    def __init__(self, path: str, targets: dict[str, tuple[str, str]]) -> None:
        super().__init__(path, {name: code for name, (_, code) in targets.items()})
        options = {name: target for name, (target, _) in targets.items()}
        self._options: Registry[type[MethodOptions]] = Registry(path, options)

    def options(self, algorithm: str) -> type[MethodOptions]:
        """Return the class of an algorithm's options, without importing its code.

        Raises:
            ConfigError: unknown algorithm; the message lists the allowed ones and the nearest.
        """
        return self._options.load(algorithm)

    def build(self, options: MethodOptions) -> Any:
        """Import the code that the options belong to and return the method (`methods.base.Method`)."""
        return self.load(options.algorithm)(options)


_OPTIONS, _CODE = "starquant.config.methods", "starquant.methods"

METHODS = MethodRegistry(
    "method.algorithm",
    {
        "none": (f"{_OPTIONS}.none:FullPrecisionOptions", f"{_CODE}.none:FullPrecision"),
        "packed": (f"{_OPTIONS}.packed:PackedOptions", f"{_CODE}.packed:PackedCheckpoint"),
        "gguf": (f"{_OPTIONS}.gguf:GGUFOptions", f"{_CODE}.gguf:GGUFFile"),
        "rtn": (f"{_OPTIONS}.rtn:RTNOptions", f"{_CODE}.rtn:RTN"),
        "smoothquant": (f"{_OPTIONS}.smoothquant:SmoothQuantOptions", f"{_CODE}.smoothquant:SmoothQuant"),
        "awq": (f"{_OPTIONS}.awq:AWQOptions", f"{_CODE}.awq:AWQ"),
        "gptq": (f"{_OPTIONS}.gptq:GPTQOptions", f"{_CODE}.gptq:GPTQ"),
        "quarot": (f"{_OPTIONS}.quarot:QuaRotOptions", f"{_CODE}.quarot:QuaRot"),
        "dllmquant_plus": (f"{_OPTIONS}.dllmquant:DLLMQuantPlusOptions", f"{_CODE}.dllmquant:DLLMQuantPlus"),
        "dllmquant_plus_plus": (
            f"{_OPTIONS}.dllmquant:DLLMQuantPlusPlusOptions",
            f"{_CODE}.dllmquant:DLLMQuantPlusPlus",
        ),
        "flatquant": (f"{_OPTIONS}.flatquant:FlatQuantOptions", f"{_CODE}.flatquant.method:FlatQuant"),
        "freeact": (f"{_OPTIONS}.freeact:FreeActOptions", f"{_CODE}.freeact:FreeAct"),
        "star_quant": (f"{_OPTIONS}.star_quant:STaRQuantOptions", f"{_CODE}.star_quant.method:STaRQuant"),
    },
)

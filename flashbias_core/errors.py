"""What flashbias raises: every refusal says what was found, what is accepted and what to do."""


class FlashBiasError(Exception):
    """Base of all errors of this package.

    The message reads `found: ...; wanted: ...; remedy: ...`; the three parts are attributes of the same names.
    """

    def __init__(self, found: str, wanted: str, remedy: str) -> None:
        # Without `super().__init__`, which torch's compiler cannot trace: `args` are those of `__new__`.
        self.found, self.wanted, self.remedy = found, wanted, remedy

    def __str__(self) -> str:
        return f"found: {self.found}; wanted: {self.wanted}; remedy: {self.remedy}"


class ShapeError(FlashBiasError, ValueError):
    """A tensor's shape does not fit the others."""


class DtypeError(FlashBiasError, TypeError):
    """A tensor's dtype, or an argument's type, is not one that is accepted there."""


class DeviceError(FlashBiasError, ValueError):
    """Tensors of one call lie on different devices, or a backend does not serve the device."""


class UnsupportedError(FlashBiasError, NotImplementedError):
    """A combination that flashbias does not compute."""

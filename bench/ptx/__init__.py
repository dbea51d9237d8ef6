"""An emulation of the compiled kernels: the PTX that Triton emits, executed in numpy where there is no GPU.

`program` reads PTX, `arithmetic` computes, `memory` knows who may touch a byte and who has, `machine` runs
the blocks of a launch, and `launch` puts all of it in the place of a GPU for Triton. It is written for the
PTX of one Triton (`launch.TRITON`) and stops at an instruction that it does not know. It cannot show errors
of the assembler that comes after PTX, anything of AMD, or speed.
"""


class EmulationError(Exception):
    """What would go wrong on a GPU, or what the emulation does not know."""

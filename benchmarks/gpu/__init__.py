"""What the pool does on GPUs, beside the limits of the hardware: `python -m benchmarks gpu`.

Each part stands for itself, so that one that fails or hangs costs no other its figures. All of them measure
on torch's device that they are given, and run on a CPU with small layouts too: that is how they are tested.
"""

"""Measurements that a wheel has: `vcache bench`. Comparisons with peers are in benchmarks/."""

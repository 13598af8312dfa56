"""Where VCache meets other programs: the only package that imports vllm or lmcache."""

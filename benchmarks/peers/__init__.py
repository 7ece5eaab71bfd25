"""kvpolicy beside other tools that evict while decoding, in one process and at equal budgets."""

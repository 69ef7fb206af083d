"""Teacher outputs kept per sample, so that a frozen teacher runs once for each."""

from privdistill.cache.precompute import precompute
from privdistill.cache.stores import CacheStore
from privdistill.cache.teacher_cache import Statistics, TeacherCache

__all__ = ["CacheStore", "Statistics", "TeacherCache", "precompute"]

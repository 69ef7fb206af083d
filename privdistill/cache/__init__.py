"""Teacher outputs kept per sample, so that a frozen teacher runs once for each."""

from privdistill.cache.precompute import precompute
from privdistill.cache.teacher_cache import Statistics, TeacherCache

__all__ = ["Statistics", "TeacherCache", "precompute"]

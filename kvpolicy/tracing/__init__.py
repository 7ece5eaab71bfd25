"""Record which tokens each head still holds while a model writes, and look at the record.

:func:`trace` needs the extra ``kvpolicy[hf]``; a :class:`Trace` that was saved is read, and shown as a
page, with torch alone. The figures of :mod:`kvpolicy.tracing.plots` need matplotlib.
"""

from kvpolicy.tracing.page import write_page
from kvpolicy.tracing.recording import trace
from kvpolicy.tracing.traces import Trace

__all__ = ["Trace", "trace", "write_page"]

"""vLLM: a plug-in that serves any policy on unmodified vLLM, active where ``additional_config`` asks for it.

Importing this package imports neither vLLM nor torch's compiler; vLLM calls :func:`register` in each of its
processes, and nothing else has to be called::

    LLM(model, additional_config={"kvpolicy": {"policy": "vase(1024)", "interval": 128}})
"""

from kvpolicy.adapters.vllm.accounts import Account, account
from kvpolicy.adapters.vllm.config import Config
from kvpolicy.adapters.vllm.lengths import Reservation
from kvpolicy.adapters.vllm.plugin import register
from kvpolicy.adapters.vllm.settings import Settings

__all__ = ["Account", "Config", "Reservation", "Settings", "account", "register"]

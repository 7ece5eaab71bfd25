"""The zoo: published eviction methods, one a file, each a few lines in the algebra."""

from kvpolicy.policies.adakv import adakv
from kvpolicy.policies.cake import cake
from kvpolicy.policies.caote import caote
from kvpolicy.policies.criticalkv import criticalkv
from kvpolicy.policies.curdkv import curdkv
from kvpolicy.policies.defensivekv import defensivekv
from kvpolicy.policies.duo_attention import duo_attention
from kvpolicy.policies.expected_attention import expected_attention
from kvpolicy.policies.gkv import gkv
from kvpolicy.policies.h2o import h2o
from kvpolicy.policies.keydiff import keydiff
from kvpolicy.policies.keyformer import keyformer
from kvpolicy.policies.knorm import knorm
from kvpolicy.policies.lagkv import lagkv
from kvpolicy.policies.lazy_eviction import lazy_eviction
from kvpolicy.policies.nacl import nacl
from kvpolicy.policies.nexus import nexus
from kvpolicy.policies.pyramidkv import pyramidkv
from kvpolicy.policies.raas import raas
from kvpolicy.policies.random_eviction import random_eviction
from kvpolicy.policies.recommended import recommended
from kvpolicy.policies.rkv import rkv
from kvpolicy.policies.scissorhands import scissorhands
from kvpolicy.policies.snapkv import snapkv
from kvpolicy.policies.streaming_llm import streaming_llm
from kvpolicy.policies.tova import tova
from kvpolicy.policies.vase import vase, vase_dkv
from kvpolicy.policies.vatp import vatp

__all__ = [
    "adakv",
    "cake",
    "caote",
    "criticalkv",
    "curdkv",
    "defensivekv",
    "duo_attention",
    "expected_attention",
    "gkv",
    "h2o",
    "keydiff",
    "keyformer",
    "knorm",
    "lagkv",
    "lazy_eviction",
    "nacl",
    "nexus",
    "pyramidkv",
    "raas",
    "random_eviction",
    "recommended",
    "rkv",
    "scissorhands",
    "snapkv",
    "streaming_llm",
    "tova",
    "vase",
    "vase_dkv",
    "vatp",
]

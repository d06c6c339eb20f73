"""What can be trained in the place of LoRA: the other rows of its paper's Table 3 (Hu et al. 2021).

Bottlenecks are put into the blocks of a frozen base, a prefix stands before what these attend to;
a subset trains parameters that the base has.
"""

from methods.bottleneck import BOTTLENECKS, Bottleneck, BottleneckConfig, bottleneck
from methods.paper import TABLE_3, table_3_row
from methods.prefix import Prefix, PrefixConfig
from methods.subsets import is_added, train_added, train_only

ADDITIONS = (*BOTTLENECKS, "prefix")  # methods whose tensors are added to a frozen base

__all__ = [
    "ADDITIONS",
    "BOTTLENECKS",
    "Bottleneck",
    "BottleneckConfig",
    "Prefix",
    "PrefixConfig",
    "TABLE_3",
]
__all__ += ["bottleneck", "is_added", "table_3_row", "train_added", "train_only"]

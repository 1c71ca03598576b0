"""A method whose class no source shows: what a plug-in may do."""

from meristem.methods.base import Method

Made = type(
    "Made",
    (Method,),
    {
        "__doc__": "Made at run time.",
        "name": "made",
        "claims": ("less-forgetting",),
        "stages": frozenset({"cit"}),
        "penalty": lambda self, params: None,
    },
)

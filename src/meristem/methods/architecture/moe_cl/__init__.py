"""MoE-CL: an adversarial mixture of LoRA experts (Kang et al. 2025, arXiv 2509.18133)."""

from meristem.methods.architecture.moe_cl.method import MoECL

__all__ = ["MoECL"]

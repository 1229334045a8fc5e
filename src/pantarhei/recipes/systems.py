"""The 16 systems of the project and how far each one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A published system: its name on the command line, its paper, and what of it works here."""

    name: str
    paper: str
    state: str = "planned"


SYSTEMS = (
    System("rectified-flow", "Flow Straight and Fast, 2209.03003", "complete"),
    System("rectified-flow-plus-plus", "Improving the Training of Rectified Flows, 2405.20320", "complete"),
    System(
        "rectified-diffusion",
        "Straightness Is Not Your Need in Rectified Flow, 2410.07303",
        "complete",
    ),
    System("consistency-trajectory-models", "Consistency Trajectory Models, 2310.02279", "complete"),
    System("stochastic-interpolants", "Stochastic Interpolants, 2303.08797", "complete"),
    System("adjoint-dpm", "AdjointDPM, 2307.10711", "complete"),
    System("mmdit", "Scaling Rectified Flow Transformers, 2403.03206"),
    System("triflow", "Taming Feed-forward Reconstruction Models, 2501.00651"),
    System("splatflow-3d", "SplatFlow (3D), 2411.16443"),
    System("periodwave", "PeriodWave, 2408.07547"),
    System("fcaformer", "FcaFormer, 2211.07198"),
    System("splatflow-optical", "SplatFlow (optical flow), 2306.08887"),
    System("forward-gnn", "ForwardGNN, 2403.11004"),
    System("physical-forward-forward", "Backpropagation-free Training of Deep Physical Neural Networks, 2304.11042"),
    System("coherent-structures", "Coherent structures at turbulent interfaces, 2412.13272"),
    System("ifactformer", "IFactFormer-m, 2412.18840"),
)

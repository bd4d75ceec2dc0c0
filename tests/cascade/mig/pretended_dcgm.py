"""A pretended dcgm-exporter: text in the exporter's format for an A100 with four slices, by a known rule.

No GPU is behind it. It draws `IDLE_W`, and `SM_W` for each active SM; the 1g slices are as active as ACTIVITY says.
"""

from __future__ import annotations

from typing import Final

IDLE_W: Final = 55.0
SM_W: Final = 2.0
UUID: Final = "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"
# instance: profile, SMs, pod, activity
SLICES: Final = {
    "7": ("1g.5gb", 14, "triton-1g-5gb-6d5f8c9b7-x2x4z", 0.5),
    "8": ("1g.5gb", 14, "triton-1g-5gb-6d5f8c9b7-k9qwp", 0.1),
    "3": ("2g.10gb", 28, "", 0.0),
    "1": ("3g.20gb", 42, "triton-3g-20gb-7c6d9f4b8-pp7rt", 0.25),
}
POWER_W: Final = IDLE_W + sum(SM_W * sms * activity for _, sms, _, activity in SLICES.values())
# requests a second, by pod
CALLS_PER_S: Final = {pod: 100.0 * sms * activity for _, sms, pod, activity in SLICES.values() if pod}


def exposition(seconds: float) -> str:
    """What the exporter answers so many seconds after the driver was loaded."""
    lines = []
    for name, kind, value in (
        ("DCGM_FI_DEV_POWER_USAGE", "gauge", POWER_W),
        ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", 1e3 * POWER_W * seconds),
        ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "gauge", None),
    ):
        lines += [f"# HELP {name} {name}.", f"# TYPE {name} {kind}"]
        for instance, (profile, _, pod, activity) in SLICES.items():
            labels = {
                "gpu": "0",
                "UUID": UUID,
                "pci_bus_id": "00000000:07:00.0",
                "device": "nvidia0",
                "modelName": "NVIDIA A100-SXM4-40GB",
                "GPU_I_PROFILE": profile,
                "GPU_I_ID": instance,
                "Hostname": "node-a",
                "container": "triton" if pod else "",
                "namespace": "cascade" if pod else "",
                "pod": pod,
            }
            text = ",".join(f'{label}="{words}"' for label, words in labels.items())
            lines.append(f"{name}{{{text}}} {activity if value is None else value:.6f}")
    return "\n".join(lines) + "\n"


def triton_exposition(pod: str, seconds: float) -> str:
    """What a Triton of the pod answers; the pod's label is added by whoever scrapes."""
    name = "nv_inference_request_success"
    return f'# TYPE {name} counter\n{name}{{model="deep",version="1"}} {CALLS_PER_S[pod] * seconds:.1f}\n'


def worker_exposition(seconds: float) -> str:
    """What the service answers."""
    name = "cascade_deep_call_duration_seconds"
    calls = sum(CALLS_PER_S.values()) * seconds
    return f'# TYPE {name} histogram\n{name}_bucket{{le="+Inf"}} {calls}\n{name}_count {calls}\n{name}_sum {calls}\n'

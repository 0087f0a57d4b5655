"""devices: the GPUs of this machine -> DeviceLease, a spare one for one peel. Imports no torch, initialises no CUDA."""

from peel_agent.devices.leases import Devices, device_for

__all__ = ["Devices", "device_for"]

"""Tier `process`: bubblewrap, our own seccomp filter and control groups, without a daemon."""

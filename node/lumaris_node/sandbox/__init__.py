"""What confines a guest on Linux: system call filters, control groups, network namespaces."""

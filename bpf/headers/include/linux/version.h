#ifndef LB_SHIM_VERSION_H
#define LB_SHIM_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
/* Nothing of ours depends on it; BCC wants it to exist. */
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
#endif

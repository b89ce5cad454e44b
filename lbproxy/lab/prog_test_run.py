"""What BPF_PROG_TEST_RUN takes: libbpf's options, and a context for each kind of packet program."""

import ctypes


class Options(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    ]


class Skb(ctypes.Structure):
    """struct __sk_buff, as far as it is given: test runs take a device, and no VLAN tag."""

    _fields_ = [
        ("before", ctypes.c_uint32 * 10),
        ("ifindex", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 148),
    ]


class XdpMd(ctypes.Structure):
    """struct xdp_md: likewise, and where data begins and ends."""

    _fields_ = [
        ("data", ctypes.c_uint32),
        ("data_end", ctypes.c_uint32),
        ("data_meta", ctypes.c_uint32),
        ("ingress_ifindex", ctypes.c_uint32),
        ("rx_queue_index", ctypes.c_uint32),
        ("egress_ifindex", ctypes.c_uint32),
    ]

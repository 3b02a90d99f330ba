"""Networks, data and settings of the experiments behind ``secateur train``: no part of the library proper."""

"""What programs for Lightning Fabric import, besides what is here anyway.

``kinds`` has the classes that they ask ``isinstance`` of, ``torch_collective`` and ``lazy_loading`` one class each, and
``helpers`` functions. The modules ``accelerators``, ``plugins``, ``utilities`` and ``wrappers`` of fabric_lite export
them under Lightning's sub-paths, and nothing in fabric_lite imports those.
"""

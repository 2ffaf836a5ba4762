"""One module per host project. Importing it patches that host, at once or as soon as the host is imported.

import flashbias.integrations.swin_v2  # timm's SwinV2 from now on; swin_v2.revert() undoes it
"""

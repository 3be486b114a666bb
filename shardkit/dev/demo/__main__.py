"""A client process of the demo, as the demo starts it; for people there is `shardkit demo`."""

import sys

from shardkit.dev.demo.client import main

main(sys.argv[1:])

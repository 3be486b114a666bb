"""What pyproject.toml cannot say: the native core, and the migrations that are installed as shardkit._migrations.

The extension is optional: where it cannot be compiled the build goes on, and shardkit runs on the pure-Python twin.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

packages = find_packages(include=["shardkit", "shardkit.*"])
package_dir = {}
if (HERE / "migrations").is_dir():
    packages.append("shardkit._migrations")
    package_dir["shardkit._migrations"] = "migrations"

# No cythonize(), which forgets `optional`: setuptools compiles a .pyx itself where Cython is installed.
# -O3 for the vectorised loops; distribution builds of Python often say -O2.
ring = Extension(
    "shardkit._ring",
    ["_ring.pyx"],
    extra_compile_args=[] if sys.platform == "win32" else ["-O3"],
    optional=True,
)

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[ring],
)

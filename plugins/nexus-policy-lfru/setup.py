"""The part of the build that pyproject.toml cannot say: where the header of nexus_ext is."""

from setuptools import Extension, setup

from nexus_ext import get_include

setup(
    ext_modules=[
        # Loaded with ctypes, so it uses nothing of Python: one binary for every version.
        Extension(
            "nexus_policy_lfru._policy",
            ["src/policy.c"],
            include_dirs=[get_include()],
            libraries=["m"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

# The headers are in the compiler's path: CMakeLists.txt.

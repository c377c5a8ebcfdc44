// How this library was built. The macros come from CMakeLists.txt.

#include "ckpt_core.h"

const char* ckpt_build_compiler(void) { return CKPT_BUILD_COMPILER; }
const char* ckpt_build_type(void) { return CKPT_BUILD_TYPE; }
const char* ckpt_build_sanitizer(void) { return CKPT_BUILD_SANITIZER; }

/* TEST DOUBLE of the CUDA driver library: the calls that a launch makes, recorded instead of executed.
   Loaded first and named libcuda.so.1, it is what ctypes and cuda-bindings find under that name. */
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

enum { INVALID_PTX = 218, NOT_FOUND = 500 };

/* What hypersphere_update was launched with: sizes are grid x y z, block x y z, shared memory. */
struct Launch {
  uint64_t function, sizes[7], stream, inputs[3];
  int64_t rows;
  uint64_t output;
};
static struct Launch last;
static char entry[64];

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorName(int status, const char **name) { return *name = status == INVALID_PTX ? "CUDA_ERROR_INVALID_PTX" : "?", 0; }
int cuModuleLoadData(void **module, const char *ptx) {
  if (!strstr(ptx, ".version")) return INVALID_PTX;
  return *module = (void *)0x100, 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  strncpy(entry, name, sizeof entry - 1);
  return *function = (void *)((uintptr_t)module + 0x11), 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
  const uint64_t sizes[7] = {gx, gy, gz, bx, by, bz, shared};
  if (extra) return 1;
  last.function = (uintptr_t)function, last.stream = (uintptr_t)stream;
  memcpy(last.sizes, sizes, sizeof sizes);
  for (int i = 0; i < 3; ++i) last.inputs[i] = *(uint64_t *)arguments[i];
  last.rows = *(int32_t *)arguments[3];
  last.output = *(uint64_t *)arguments[4];
  return 0;
}
/* How cuda-bindings looks the others up. */
int cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, void *status) {
  return (*address = dlsym(RTLD_DEFAULT, name)) ? 0 : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, address, version, flags, 0);
}

const struct Launch *last_launch(void) { return &last; }
const char *last_entry(void) { return entry; }

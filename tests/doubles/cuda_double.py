"""TEST DOUBLES: the CUDA runtime and TensorRT, as far as engines/runtime/tensorrt_runner.py uses them. No GPU is involved.

`CudaDouble` stands for the module cuda.bindings.runtime. Device memory is host memory, new memory is full of 0xFF (NaN as a float), and
nothing that is queued on a stream happens before the stream is synchronised: what reads too early, or overwrites too early,
gets or gives wrong bytes. Use after free, a copy past an allocation's end and a copy of unpinned memory raise `Misuse`.

`TensorRTDouble` stands for the module tensorrt or tensorrt_rtx: it "deserialises" one plan, whose network is the function `evaluate`
(feeds by name -> outputs by name), called at synchronisation with what then lies at the addresses bound at enqueue. Its
methods have TensorRT's names and refuse, as TensorRT does, by returning False and logging.
"""

from __future__ import annotations

import enum
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np

PLAN = b"a plan for the double"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32}


class Misuse(AssertionError):
    """Something that would corrupt memory, or crash, on a device."""


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class Kind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Attribute(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class CudaDouble:
    cudaError_t, cudaMemcpyKind, cudaDeviceAttr, cudaStreamNonBlocking = Error, Kind, Attribute, 1
    SIDES = {
        Kind.cudaMemcpyHostToDevice: ("device", "host"),
        Kind.cudaMemcpyDeviceToHost: ("host", "device"),
        Kind.cudaMemcpyDeviceToDevice: ("device", "device"),
    }

    def __init__(self, capability=(12, 0), memory=1 << 30):
        self.capability, self.memory = capability, memory
        self.live = {}  # address -> (side, array)
        self.dead = []  # kept, so that no address is handed out twice
        self.queue = []
        self.calls = []
        self.fail = {}  # function name -> error it returns
        self.stream = None
        self.devices = {}  # thread -> its current device, 0 at first
        self.home = None  # where the stream lives

    def _code(self, name):
        if self.home is not None and name != "cudaSetDevice" and self._device() != self.home:
            raise Misuse(f"{name} on device {self._device()}, but the stream is on {self.home}")
        self.calls.append(name)
        return self.fail.get(name, Error.cudaSuccess)

    def _new(self, name, side, size):
        code = self._code(name)
        used = sum(array.nbytes for kind, array in self.live.values() if kind == "device")
        if side == "device" and used + size > self.memory:
            code = Error.cudaErrorMemoryAllocation
        if code != Error.cudaSuccess:
            return code, None
        raw = np.full(size + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        array = raw[start : start + size]
        self.live[array.ctypes.data] = (side, array)
        self.dead.append(raw)
        return code, array.ctypes.data

    def view(self, address, size, side):
        """The bytes [address, address + size), which must lie in one live allocation of that side."""
        for start, (kind, array) in self.live.items():
            if start <= address and address + size <= start + array.nbytes:
                if kind != side:
                    raise Misuse(f"{kind} memory used as {side} memory")
                return array[address - start : address - start + size]
        raise Misuse(f"{size} bytes at {address:#x} are in no live allocation")

    def _free(self, name, address, side):
        if self.queue:
            raise Misuse("memory freed while work that may use it is queued")
        if address not in self.live or self.live[address][0] != side:
            raise Misuse(f"{address:#x} freed twice, or never allocated")
        del self.live[address]
        return (self._code(name),)

    def _enqueue(self, stream, action):
        if self.stream is None or stream != self.stream:
            raise Misuse("no such stream")
        self.queue.append(action)

    def _device(self):
        return self.devices.get(threading.get_ident(), 0)

    # The functions of cuda.bindings.runtime.

    def cudaGetDevice(self):
        return self._code("cudaGetDevice"), self._device()

    def cudaSetDevice(self, device):
        self.devices[threading.get_ident()] = device
        return (self._code("cudaSetDevice"),)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking and self.stream is None
        self.stream, self.home = 77, self._device()
        return self._code("cudaStreamCreateWithFlags"), self.stream

    def cudaStreamDestroy(self, stream):
        assert stream == self.stream and not self.queue
        code = self._code("cudaStreamDestroy")
        self.stream = self.home = None
        return (code,)

    def cudaStreamSynchronize(self, stream):
        assert stream == self.stream
        code = self._code("cudaStreamSynchronize")
        if code == Error.cudaSuccess:
            while self.queue:
                self.queue.pop(0)()
        return (code,)

    def cudaDeviceGetAttribute(self, attribute, device):
        major, minor = self.capability
        return self._code("cudaDeviceGetAttribute"), major if attribute == Attribute.cudaDevAttrComputeCapabilityMajor else minor

    def cudaMemGetInfo(self):
        return self._code("cudaMemGetInfo"), self.memory, self.memory

    def cudaGetErrorString(self, code):
        return Error.cudaSuccess, {2: b"out of memory", 100: b"no CUDA-capable device is detected"}[int(code)]

    def cudaMalloc(self, size):
        return self._new("cudaMalloc", "device", size)

    def cudaMallocHost(self, size):
        return self._new("cudaMallocHost", "host", size)

    def cudaFree(self, address):
        return self._free("cudaFree", address, "device")

    def cudaFreeHost(self, address):
        return self._free("cudaFreeHost", address, "host")

    def cudaMemsetAsync(self, address, value, size, stream):
        self.view(address, size, "device")
        self._enqueue(stream, lambda: self.view(address, size, "device").fill(value))
        return (self._code("cudaMemsetAsync"),)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        return self._copy("cudaMemcpyAsync", target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        return self._copy("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind, stream)

    def _copy(self, name, target, target_pitch, source, source_pitch, width, height, kind, stream):
        to, of = self.SIDES[kind]
        if width > min(target_pitch, source_pitch):
            raise Misuse("rows wider than their pitch")
        rows = [(target + i * target_pitch, source + i * source_pitch) for i in range(height)]
        for into, start in rows:
            self.view(start, width, of)
            if to == "host":  # whatever was there is no longer to be relied on
                self.view(into, width, to).fill(0xFF)
            self.view(into, width, to)

        def act():
            for into, start in rows:
                self.view(into, width, to)[:] = self.view(start, width, of)

        self._enqueue(stream, act)
        return (self._code(name),)


class DataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT32 = "int32"


class TensorRTDouble:
    """`TensorRTDouble(cuda, evaluate, tensors, profiles, aliases)`, a module to put in sys.modules.

    tensors: name -> (dtype, shape with -1, is_input). profiles: a list of {input name: (smallest, largest) shape}. aliases: output ->
    input that it overwrites. plan: the bytes of the one plan it can load.
    """

    DataType = DataType

    class ILogger:
        Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def __init__(self, cuda, evaluate, tensors, profiles, aliases, version="1.7.1.116", name="tensorrt_rtx", plan=PLAN):
        self.__version__, self.__name__, self.plan = version, name, plan
        self.cuda, self.evaluate, self.tensors, self.profiles, self.aliases = cuda, evaluate, tensors, profiles, aliases
        self.contexts = []
        self.feeds = []  # of every step that ran
        self.deserialised = 0

    def Runtime(self, logger):
        def deserialize_cuda_engine(data):
            self.deserialised += 1
            if bytes(data) == self.plan:
                return EngineDouble(self, logger)
            logger.log(self.ILogger.Severity.ERROR, "the magic tag does not match")
            return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class EngineDouble:
    def __init__(self, module, logger):
        self._module, self._logger = module, logger
        self.num_io_tensors, self.num_optimization_profiles = len(module.tensors), len(module.profiles)

    def get_tensor_name(self, index):
        return list(self._module.tensors)[index]

    def get_tensor_dtype(self, name):
        return DataType(self._module.tensors[name][0])

    def get_tensor_shape(self, name):
        return self._module.tensors[name][1]

    def get_tensor_profile_shape(self, name, profile):
        low, high = self._module.profiles[profile][name]
        return [low, high, high]

    def get_aliased_input_tensor(self, name):
        return self._module.aliases.get(name)

    def create_execution_context(self):
        context = ContextDouble(self._module, self._logger)
        self._module.contexts.append(context)
        return context


class ContextDouble:
    def __init__(self, module, logger):
        self._module, self._logger = module, logger
        self._profile, self._shapes, self._addresses = None, {}, {}

    def _refuse(self, why):
        self._logger.log(self._module.ILogger.Severity.ERROR, why)
        return False

    def set_optimization_profile_async(self, profile, stream):
        self._profile = self._module.profiles[profile]
        self._module.cuda._enqueue(stream, lambda: None)
        return True

    def set_input_shape(self, name, shape):
        low, high = self._profile[name]
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"shape {shape} of {name} is not in {low}..{high}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        if name not in self._module.tensors or address % 256:
            return self._refuse(f"{name} at {address:#x}")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        tensors, shapes, addresses = self._module.tensors, dict(self._shapes), dict(self._addresses)
        inputs = [name for name, (_, _, is_input) in tensors.items() if is_input]
        if unbound := sorted((set(inputs) - set(shapes)) | (set(tensors) - set(addresses))):
            return self._refuse(f"not bound: {unbound}")
        batch, rows = shapes["input_ids"][0], shapes["logit_rows"][0]
        for name, (_, shape, is_input) in tensors.items():
            if not is_input:
                shapes[name] = (rows if name == "logits" else batch, *shape[1:])
        for output, source in self._pairs():
            if self._module.aliases.get(output) == source and addresses[output] != addresses[source]:
                return self._refuse(f"{output} must lie where {source} lies")
            if self._module.aliases.get(output) is None and addresses[output] == addresses[source]:
                raise Misuse(f"{output} overwrites {source} while it is read")
        self._module.cuda._enqueue(stream, lambda: self._run(shapes, addresses, inputs))
        return True

    def _pairs(self):
        return [(name, name.replace("present", "past_key_values")) for name in self._module.tensors if name.startswith("present")]

    def _array(self, name, shapes, addresses):
        dtype = np.dtype(DTYPES[self._module.tensors[name][0]])
        size = int(np.prod(shapes[name])) * dtype.itemsize
        return self._module.cuda.view(addresses[name], size, "device").view(dtype).reshape(shapes[name])

    def _run(self, shapes, addresses, inputs):
        feeds = {name: self._array(name, shapes, addresses).copy() for name in inputs}
        self._module.feeds.append(feeds)
        outputs = self._module.evaluate(feeds)
        for name, (_, _, is_input) in self._module.tensors.items():
            if not is_input:
                place = self._array(name, shapes, addresses)
                assert outputs[name].shape == place.shape, name
                place[:] = outputs[name].astype(place.dtype)


def decoder(cuda, evaluate, model, cache="in-place", prefill_tokens=8, decode_batch=4, **options):
    """A TensorRTDouble with the inputs, outputs and profiles of a decoder plan for `model` (the manifest's)."""
    row = (model.num_kv_heads, model.max_length, model.head_dim)
    tensors = {"input_ids": ("int32", (-1, -1), True), "position_ids": ("int32", (-1, -1), True)}
    tensors |= {name: ("int32", (-1,), True) for name in ("lengths", "write_at", "logit_rows")}
    tensors["logits"] = ("float32", (-1, model.vocab_size), False)
    prefill = {"input_ids": ((1, 1), (1, prefill_tokens)), "position_ids": ((1, 1), (1, prefill_tokens))}
    prefill |= {"lengths": ((1,), (1,)), "write_at": ((1,), (1,)), "logit_rows": ((1,), (prefill_tokens,))}
    decode = {name: ((1, 1), (decode_batch, 1)) for name in ("input_ids", "position_ids")}
    decode |= {name: ((1,), (decode_batch,)) for name in ("lengths", "write_at", "logit_rows")}
    aliases = {}
    for layer in range(model.num_layers):
        for kind in ("key", "value"):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            tensors[past], tensors[present] = (model.cache_dtype, (-1, *row), True), (model.cache_dtype, (-1, *row), False)
            prefill[past], decode[past] = ((1, *row), (1, *row)), ((1, *row), (decode_batch, *row))
            if cache == "in-place":
                aliases[present] = past
    return TensorRTDouble(cuda, evaluate, tensors, [prefill, decode], aliases, **options)

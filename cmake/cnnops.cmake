# The only place with instruction-set and CUDA compile flags.
#
#   cnnops_add_module(<target> <sources>...)  the Python extension module
#   cnnops_add_op(<op> [CPU <names>...] [BF16 <names>...] [PAIRS <names>...] [CUDA <names>...|NO_CUDA])
#                                             csrc/ops/<op>.cpp, csrc/reference/<op>.cpp, and csrc/cpu/<name>.cpp once per
#                                             instruction set (<op>.cpp where no names are given); what is under BF16 once
#                                             more, for bfloat16 alone, with the instructions that round to it; what is under
#                                             PAIRS once per instruction set with products of pairs of bfloat16 numbers;
#                                             csrc/cuda/<name>.cu (<op>.cu where no names are given)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "cnnops needs GCC or Clang (vector extensions); found ${CMAKE_CXX_COMPILER_ID}")
endif()

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)

# Instruction-set levels of the CPU kernels, and what each is compiled with.
set(CNNOPS_ISAS baseline)
set(CNNOPS_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND CNNOPS_ISAS avx2 avx512)
  set(CNNOPS_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(CNNOPS_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512)
endif()

# Levels that add products of pairs of bfloat16 numbers: only sources that use them are compiled for these. The emulated one
# has loops in the place of the matrix unit's instructions: kernels for it are tested on any CPU.
set(CNNOPS_PAIRS_ISAS amx_emulated)
set(CNNOPS_FLAGS_amx_emulated "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" CNNOPS_HAS_PAIRS)
  if(CNNOPS_HAS_PAIRS)
    list(APPEND CNNOPS_PAIRS_ISAS avx512_bf16 amx)
    set(CNNOPS_FLAGS_avx512_bf16 ${CNNOPS_FLAGS_avx512} -mavx512bf16)
    set(CNNOPS_FLAGS_amx ${CNNOPS_FLAGS_avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
    set(CNNOPS_INCLUDES_avx512_bf16 avx512)  # whose branches of the shared headers they take
    set(CNNOPS_INCLUDES_amx avx512)
  endif()
endif()

# GCC 12 reports its own intrinsics headers (_mm512_undefined_ps) as uninitialized.
set(CNNOPS_WARNINGS -Wall -Wextra -Wno-unused-function -Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-pragmas
    $<$<BOOL:${CNNOPS_WERROR}>:-Werror>)
# Contraction to FMA is allowed (the references are checked with tolerances); reassociation is not.
set(CNNOPS_KERNEL_FLAGS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast ${CNNOPS_WARNINGS})

if(NOT CNNOPS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CNNOPS_CUDA is AUTO, ON or OFF, not \"${CNNOPS_CUDA}\"")
endif()
if(NOT CNNOPS_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # Machine code for the GPUs that are tuned for, and PTX that the driver compiles for others. All from PTX for sm_80, which
    # the kernels need (cp.async, mma.sync for bfloat16): PTX for each would be the same text, at two to four seconds a source.
    # But what ends in "a" has instructions of its own, which PTX for others cannot have.
    set(CNNOPS_CUDA_CAPABILITIES "80;89;90a" CACHE STRING "Compute capabilities to have machine code for; 80 at least")
    set(CNNOPS_CUDA_CODE compute_80)
    set(CNNOPS_CUDA_TARGETS "")
    foreach(capability ${CNNOPS_CUDA_CAPABILITIES})
      if(capability MATCHES "a$")
        list(APPEND CNNOPS_CUDA_TARGETS "--generate-code=arch=compute_${capability},code=sm_${capability}")
      else()
        list(APPEND CNNOPS_CUDA_CODE sm_${capability})
      endif()
    endforeach()
    string(REPLACE ";" "," CNNOPS_CUDA_CODE "${CNNOPS_CUDA_CODE}")
    list(APPEND CNNOPS_CUDA_TARGETS "--generate-code=arch=compute_80,code=[${CNNOPS_CUDA_CODE}]")
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12)  # C++20
      set(CNNOPS_HAS_CUDA ON)
    elseif(CNNOPS_CUDA STREQUAL "ON")
      message(FATAL_ERROR
        "CNNOPS_CUDA=ON, but ${CMAKE_CUDA_COMPILER} is of version ${CMAKE_CUDA_COMPILER_VERSION}, and the kernels need 12.0. "
        "Put a newer nvcc on PATH, or build without CUDA kernels with CNNOPS_CUDA=OFF.")
    else()
      message(STATUS "No CUDA kernels: ${CMAKE_CUDA_COMPILER} is older than 12.0")
    endif()
  elseif(CNNOPS_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "CNNOPS_CUDA=ON, but no CUDA compiler was found. Put nvcc on PATH, or set CUDACXX or CMAKE_CUDA_COMPILER to it, "
      "or build without CUDA kernels with CNNOPS_CUDA=OFF.")
  endif()
endif()

# The CUDA kernels compiled for the host over csrc/cuda/emulation, for the tests: rows of the kernel tables that are never
# chosen by themselves. -fsanitize=thread is for its calls at each access to memory, which the emulator answers; the
# sanitizer's library is not linked. Little optimization, so that accesses stay as the source has them.
option(CNNOPS_EMULATION "Build the CUDA kernels for the host, for tests" OFF)
set(CNNOPS_EMULATION_FLAGS -O1 -fsanitize=thread -fno-tree-slp-vectorize -fno-math-errno ${CNNOPS_WARNINGS})
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND CNNOPS_EMULATION_FLAGS --param=tsan-instrument-func-entry-exit=0 -fno-store-merging)
endif()

function(cnnops_add_module target)
  pybind11_add_module(${target} MODULE NO_EXTRAS ${ARGN})
  # As one source, 18 CPU seconds instead of 105: each by itself would compile pybind11's headers and inline functions, six of
  # its seven.
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
  target_include_directories(${target} PRIVATE csrc)
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  target_compile_options(${target} PRIVATE -O2 ${CNNOPS_WARNINGS})
  string(REPLACE ";" "," isas "${CNNOPS_ISAS};${CNNOPS_PAIRS_ISAS}")
  target_compile_definitions(${target} PRIVATE
    CNNOPS_VERSION="${PROJECT_VERSION}"
    CNNOPS_BUILT_ISAS="${isas}"
    CNNOPS_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    CNNOPS_X86=$<BOOL:${CNNOPS_FLAGS_avx2}>
    CNNOPS_PAIRS=$<BOOL:${CNNOPS_HAS_PAIRS}>
    CNNOPS_CUDA=$<BOOL:${CNNOPS_HAS_CUDA}>
    CNNOPS_EMULATION=$<BOOL:${CNNOPS_EMULATION}>)
  install(TARGETS ${target} LIBRARY DESTINATION cnnops)
  set(CNNOPS_MODULE ${target} PARENT_SCOPE)
  foreach(isa reference ${CNNOPS_ISAS} ${CNNOPS_PAIRS_ISAS})
    set(library cnnops_${isa})
    add_library(${library} OBJECT)
    target_include_directories(${library} PRIVATE csrc)
    target_compile_definitions(${library} PRIVATE CNNOPS_ISA=${isa} CNNOPS_ISA_${isa}=1)
    foreach(included ${CNNOPS_INCLUDES_${isa}})
      target_compile_definitions(${library} PRIVATE CNNOPS_ISA_${included}=1)
    endforeach()
    target_compile_options(${library} PRIVATE ${CNNOPS_KERNEL_FLAGS} ${CNNOPS_FLAGS_${isa}})
    target_link_libraries(${library} PRIVATE OpenMP::OpenMP_CXX)
    target_link_libraries(${target} PRIVATE ${library})
  endforeach()
  if(CNNOPS_HAS_CUDA)
    add_library(cnnops_cuda OBJECT csrc/cuda/runtime.cu)
    string(REPLACE ";" "," capabilities "${CNNOPS_CUDA_CAPABILITIES}")
    target_include_directories(cnnops_cuda PRIVATE csrc)
    target_compile_definitions(cnnops_cuda PRIVATE
      CNNOPS_ISA=cuda CNNOPS_DEVICE_SOURCE=1 CNNOPS_CUDA_CAPABILITIES="${capabilities}")
    target_compile_options(cnnops_cuda PRIVATE -O3 ${CNNOPS_CUDA_TARGETS})
    if(CNNOPS_EMULATION)  # tests/test_cuda_build.py looks for register spills in what ptxas says
      target_compile_options(cnnops_cuda PRIVATE -Xptxas=-v)
      set_target_properties(cnnops_cuda PROPERTIES
        CUDA_COMPILER_LAUNCHER "sh;${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_messages.sh")
    endif()
    target_link_libraries(${target} PRIVATE cnnops_cuda)
    set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  endif()
  if(CNNOPS_EMULATION)
    add_library(cnnops_emulation OBJECT csrc/cuda/emulation/emulator.cpp)
    target_include_directories(cnnops_emulation PRIVATE csrc)
    target_compile_options(cnnops_emulation PRIVATE -O2 ${CNNOPS_WARNINGS})
    add_library(cnnops_cuda_emulated OBJECT)
    target_include_directories(cnnops_cuda_emulated PRIVATE csrc)
    target_compile_definitions(cnnops_cuda_emulated PRIVATE
      CNNOPS_ISA=cuda_emulated CNNOPS_DEVICE_SOURCE=1 CNNOPS_EMULATED=1)
    target_compile_options(cnnops_cuda_emulated PRIVATE ${CNNOPS_EMULATION_FLAGS})
    target_link_libraries(${target} PRIVATE cnnops_emulation cnnops_cuda_emulated)
  endif()
endfunction()

function(cnnops_add_op op)
  cmake_parse_arguments(ARG "NO_CUDA" "" "CPU;BF16;PAIRS;CUDA" ${ARGN})
  if(NOT ARG_CPU)
    set(ARG_CPU ${op})
  endif()
  if(NOT ARG_CUDA AND NOT ARG_NO_CUDA)
    set(ARG_CUDA ${op})
  endif()
  target_sources(${CNNOPS_MODULE} PRIVATE csrc/ops/${op}.cpp)
  target_sources(cnnops_reference PRIVATE csrc/reference/${op}.cpp)
  foreach(isa ${CNNOPS_ISAS})
    foreach(source ${ARG_CPU})
      target_sources(cnnops_${isa} PRIVATE csrc/cpu/${source}.cpp)
    endforeach()
  endforeach()
  if(CNNOPS_HAS_PAIRS)
    foreach(source ${ARG_BF16})
      target_sources(cnnops_avx512_bf16 PRIVATE csrc/cpu/${source}.cpp)
    endforeach()
  endif()
  foreach(isa ${CNNOPS_PAIRS_ISAS})
    foreach(source ${ARG_PAIRS})
      target_sources(cnnops_${isa} PRIVATE csrc/cpu/${source}.cpp)
    endforeach()
  endforeach()
  foreach(source ${ARG_CUDA})
    if(CNNOPS_HAS_CUDA)
      target_sources(cnnops_cuda PRIVATE csrc/cuda/${source}.cu)
    endif()
    if(CNNOPS_EMULATION)  # a source has one language, so the host's compiler gets one of its own
      set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/emulated/${source}.cpp)
      file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"cuda/${source}.cu\"\n" @ONLY)
      target_sources(cnnops_cuda_emulated PRIVATE ${wrapper})
    endif()
  endforeach()
endfunction()

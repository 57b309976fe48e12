// Kernels of float32 for Python.
#include "floats.h"

#include "module.h"

namespace noctule::runtime {
namespace {

FloatKernels kernels = portable_floats();

template <class R, class... A>
void def(nanobind::module_& m, const char* name, R (*FloatKernels::*kernel)(A...)) {
    m.def(name, [kernel](A... arguments) {
        nanobind::gil_scoped_release release;
        return (kernels.*kernel)(arguments...);
    });
}

}  // namespace

void bind_floats(nanobind::module_& m) {
    using K = FloatKernels;
    def(m, "dense_rows", &K::dense_rows), def(m, "dense", &K::dense), def(m, "dots", &K::dots), def(m, "sparse", &K::sparse);
    def(m, "matmul", &K::matmul), def(m, "frame", &K::frame), def(m, "max_pool", &K::max_pool), def(m, "mean_pool", &K::mean_pool);
    def(m, "mean", &K::mean), def(m, "softmax", &K::softmax), def(m, "layer_norm", &K::layer_norm), def(m, "affine", &K::affine);
    def(m, "add", &K::add), def(m, "multiply", &K::multiply), def(m, "clamp", &K::clamp), def(m, "activate", &K::activate);
    def(m, "permute", &K::permute), def(m, "copy_lines", &K::copy_lines), def(m, "spread", &K::spread), def(m, "embed", &K::embed);
    def(m, "enter", &K::enter), def(m, "leave", &K::leave);
}

void choose_floats(const std::string& instruction_set) {
#ifdef NOCTULE_X86
    if (instruction_set == "vnni") return void(kernels = vnni_floats());
    if (instruction_set == "avx2") return void(kernels = avx2_floats());
#endif
    kernels = portable_floats();
}

}  // namespace noctule::runtime

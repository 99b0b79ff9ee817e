#include "llama_api.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <vector>

#include "status.h"

namespace kvf {
namespace {

constexpr const char *kMark = "llama_state_seq_get_data_ext"; // a library that has it is a libllama

struct Candidate {
    std::string path; // "" for the main program
    uint64_t base;
    uint64_t begin, end; // of its loaded segments
};

void *open_loaded(const std::string &path) {
    return dlopen(path.empty() ? nullptr : path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

std::vector<Candidate> loaded_objects() {
    std::vector<Candidate> objects;
    const auto visit = [](dl_phdr_info *info, size_t, void *data) -> int {
        Candidate object{info->dlpi_name ? info->dlpi_name : "", info->dlpi_addr, UINT64_MAX, 0};
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto &segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            const uint64_t begin = object.base + segment.p_vaddr;
            object.begin = std::min(object.begin, begin);
            object.end = std::max(object.end, begin + segment.p_memsz);
        }
        static_cast<std::vector<Candidate> *>(data)->push_back(std::move(object));
        return 0;
    };
    dl_iterate_phdr(visit, &objects);
    return objects;
}

// True if the object itself, and not a dependency of it, defines the mark.
bool is_llama(const Candidate &candidate) {
    void *handle = open_loaded(candidate.path);
    if (!handle) return false;
    const auto address = reinterpret_cast<uint64_t>(dlsym(handle, kMark));
    const bool own = address >= candidate.begin && address < candidate.end;
    dlclose(handle);
    return own;
}

template <class Function>
void look_up(void *handle, Function &function, const char *name, const std::string &path,
             bool required = true) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (!function && required) {
        throw Error(KVF_ERR_UNSUPPORTED, "the libllama at " + path + " has no " + name);
    }
}

} // namespace

LlamaApi find_llama(const char *wanted) {
    std::vector<Candidate> found;
    for (const auto &object : loaded_objects()) {
        if (wanted && object.path.find(wanted) == std::string::npos) continue;
        if (is_llama(object)) found.push_back(object);
    }
    if (found.empty()) {
        throw Error(KVF_ERR_LIBRARY_NOT_FOUND,
                    wanted ? std::string("none whose path has '") + wanted + "' in it" : "");
    }
    if (found.size() > 1) {
        throw Error(KVF_ERR_LIBRARY_AMBIGUOUS, found[0].path + ", " + found[1].path);
    }

    LlamaApi api;
    api.path = found[0].path;
    api.base = found[0].base;
    void *handle = open_loaded(api.path);
    const auto need = [&](auto &function, const char *name) {
        look_up(handle, function, name, api.path);
    };
    const auto want = [&](auto &function, const char *name) {
        look_up(handle, function, name, api.path, false);
    };
    need(api.state_seq_get_size, "llama_state_seq_get_size_ext");
    need(api.state_seq_get_data, "llama_state_seq_get_data_ext");
    need(api.state_seq_set_data, "llama_state_seq_set_data_ext");
    need(api.get_model, "llama_get_model");
    need(api.get_memory, "llama_get_memory");
    need(api.memory_seq_rm, "llama_memory_seq_rm");
    need(api.memory_seq_pos_max, "llama_memory_seq_pos_max");
    need(api.n_ctx, "llama_n_ctx");
    want(api.n_ctx_seq, "llama_n_ctx_seq");
    need(api.n_seq_max, "llama_n_seq_max");
    need(api.model_desc, "llama_model_desc");
    need(api.model_size, "llama_model_size");
    need(api.model_n_params, "llama_model_n_params");
    need(api.model_n_swa, "llama_model_n_swa");
    need(api.model_n_ctx_train, "llama_model_n_ctx_train");
    need(api.model_is_recurrent, "llama_model_is_recurrent");
    want(api.model_is_hybrid, "llama_model_is_hybrid");
    need(api.model_meta_count, "llama_model_meta_count");
    need(api.model_meta_key_by_index, "llama_model_meta_key_by_index");
    need(api.model_meta_val_str_by_index, "llama_model_meta_val_str_by_index");
    // Through libllama's own dependencies, so that it is the ggml that this libllama uses.
    need(api.ggml.get_data, "ggml_get_data");
    need(api.ggml.tensor_get, "ggml_backend_tensor_get");
    need(api.ggml.tensor_set, "ggml_backend_tensor_set");
    need(api.ggml.buffer_free, "ggml_backend_buffer_free");
    need(api.ggml.buffer_get_base, "ggml_backend_buffer_get_base");
    need(api.ggml.buffer_get_size, "ggml_backend_buffer_get_size");
    need(api.ggml.buffer_clear, "ggml_backend_buffer_clear");
    need(api.ggml.tensor_copy, "ggml_backend_tensor_copy");
    want(api.ggml.tensor_memset, "ggml_backend_tensor_memset");
    need(api.ggml.graph_compute, "ggml_backend_sched_graph_compute_async");
    need(api.ggml.graph_n_nodes, "ggml_graph_n_nodes");
    need(api.ggml.graph_node, "ggml_graph_node");
    need(api.ggml.nbytes, "ggml_nbytes");
    need(api.ggml.op_desc, "ggml_op_desc");
    need(api.ggml.abort, "ggml_abort");
    want(api.ggml.version, "ggml_version");
    want(api.ggml.commit, "ggml_commit");
    return api; // the handle is kept: the functions must stay where they are
}

} // namespace kvf

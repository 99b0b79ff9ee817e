#include "llama/api.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>

#include <algorithm>
#include <vector>

#include "core/status.h"

namespace kvf {
namespace {

constexpr const char *kMark = "llama_decode"; // a library that has it is a libllama
constexpr const char *kNewest =
    "llama_state_seq_get_data_ext"; // of what is needed, the last to come

struct Candidate {
    std::string path; // "" for the main program
    uint64_t base;
    uint64_t begin, end; // of its loaded segments
    bool usable;         // not too old
};

const char *file_of(const Candidate &candidate) {
    return candidate.path.empty() ? "/proc/self/exe" : candidate.path.c_str();
}

std::string name_of(const Candidate &candidate) {
    return candidate.path.empty() ? "the main program" : candidate.path;
}

void *open_loaded(const std::string &path) {
    return dlopen(path.empty() ? nullptr : path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

std::vector<Candidate> loaded_objects() {
    std::vector<Candidate> objects;
    const auto visit = [](dl_phdr_info *info, size_t, void *data) -> int {
        Candidate object{info->dlpi_name ? info->dlpi_name : "", info->dlpi_addr, UINT64_MAX, 0,
                         false};
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

// The objects that themselves, and not by a dependency of theirs, define the mark.
std::vector<Candidate> loaded_llamas() {
    std::vector<Candidate> found;
    for (auto &object : loaded_objects()) {
        void *handle = open_loaded(object.path);
        if (!handle) continue;
        const auto defines = [&](const char *name) {
            const auto address = reinterpret_cast<uint64_t>(dlsym(handle, name));
            return address >= object.begin && address < object.end;
        };
        object.usable = defines(kNewest);
        if (defines(kMark)) found.push_back(object);
        dlclose(handle);
    }
    return found;
}

// The path of the object, or of a link to it; a file that has been replaced since goes by its path
// alone.
bool is_path_of(const char *path, const Candidate &candidate) {
    if (candidate.path == path) return true;
    struct stat named, loaded;
    return stat(path, &named) == 0 && stat(file_of(candidate), &loaded) == 0 &&
           named.st_dev == loaded.st_dev && named.st_ino == loaded.st_ino;
}

// Those that `wanted` names: the one whose path it is, or else all with it in their paths.
std::vector<Candidate> named_llamas(std::vector<Candidate> found, const char *wanted) {
    for (const auto &candidate : found) {
        if (is_path_of(wanted, candidate)) return {candidate};
    }
    std::erase_if(found, [&](const Candidate &candidate) {
        return candidate.path.find(wanted) == std::string::npos;
    });
    return found;
}

Candidate choose_llama(const char *wanted) {
    auto found = loaded_llamas();
    if (wanted) found = named_llamas(std::move(found), wanted);
    if (found.empty()) {
        throw Error(KVF_ERR_LIBRARY_NOT_FOUND,
                    wanted ? std::string("none whose path has '") + wanted + "' in it" : "");
    }
    const auto first_old = found[0];
    std::erase_if(found, [](const Candidate &candidate) { return !candidate.usable; });
    if (found.empty()) {
        throw Error(KVF_ERR_UNSUPPORTED,
                    "the libllama at " + name_of(first_old) + " is too old: it has no " + kNewest);
    }
    if (found.size() > 1) {
        throw Error(KVF_ERR_LIBRARY_AMBIGUOUS, name_of(found[0]) + ", " + name_of(found[1]));
    }
    return found[0];
}

// Looks functions up in one libllama.
struct Functions {
    void *handle;
    const std::string &path; // of that libllama

    template <class Function>
    void want(Function &function, const char *name) const {
        function = reinterpret_cast<Function>(dlsym(handle, name));
    }
    // Throws KVF_ERR_UNSUPPORTED if there is none.
    template <class Function>
    void need(Function &function, const char *name) const {
        want(function, name);
        if (function) return;
        throw Error(KVF_ERR_UNSUPPORTED, "the libllama at " + path + " has no " + name);
    }
};

void find_functions(const Functions &functions, LlamaApi &api) {
    functions.need(api.state_seq_get_size, "llama_state_seq_get_size_ext");
    functions.need(api.state_seq_get_data, "llama_state_seq_get_data_ext");
    functions.need(api.state_seq_set_data, "llama_state_seq_set_data_ext");
    functions.need(api.get_model, "llama_get_model");
    functions.need(api.get_memory, "llama_get_memory");
    functions.need(api.memory_seq_rm, "llama_memory_seq_rm");
    functions.need(api.memory_seq_cp, "llama_memory_seq_cp");
    functions.need(api.memory_seq_pos_min, "llama_memory_seq_pos_min");
    functions.need(api.memory_seq_pos_max, "llama_memory_seq_pos_max");
    functions.need(api.n_ctx, "llama_n_ctx");
    functions.want(api.n_ctx_seq, "llama_n_ctx_seq");
    functions.need(api.n_seq_max, "llama_n_seq_max");
    functions.need(api.model_desc, "llama_model_desc");
    functions.need(api.model_size, "llama_model_size");
    functions.need(api.model_n_params, "llama_model_n_params");
    functions.need(api.model_n_swa, "llama_model_n_swa");
    functions.need(api.model_n_ctx_train, "llama_model_n_ctx_train");
    functions.need(api.model_is_recurrent, "llama_model_is_recurrent");
    functions.want(api.model_is_hybrid, "llama_model_is_hybrid");
    functions.need(api.model_meta_count, "llama_model_meta_count");
    functions.need(api.model_meta_key_by_index, "llama_model_meta_key_by_index");
    functions.need(api.model_meta_val_str_by_index, "llama_model_meta_val_str_by_index");
}

// Through libllama's own dependencies, so that it is the ggml that this libllama uses.
void find_functions(const Functions &functions, GgmlApi &ggml) {
    functions.need(ggml.get_data, "ggml_get_data");
    functions.need(ggml.tensor_get, "ggml_backend_tensor_get");
    functions.need(ggml.tensor_set, "ggml_backend_tensor_set");
    functions.need(ggml.buffer_free, "ggml_backend_buffer_free");
    functions.need(ggml.buffer_get_base, "ggml_backend_buffer_get_base");
    functions.need(ggml.buffer_get_size, "ggml_backend_buffer_get_size");
    functions.need(ggml.buffer_clear, "ggml_backend_buffer_clear");
    functions.need(ggml.tensor_copy, "ggml_backend_tensor_copy");
    functions.want(ggml.tensor_memset, "ggml_backend_tensor_memset");
    functions.need(ggml.graph_compute, "ggml_backend_sched_graph_compute_async");
    functions.need(ggml.graph_n_nodes, "ggml_graph_n_nodes");
    functions.need(ggml.graph_node, "ggml_graph_node");
    functions.need(ggml.graph_get_tensor, "ggml_graph_get_tensor");
    functions.need(ggml.nbytes, "ggml_nbytes");
    functions.need(ggml.op_desc, "ggml_op_desc");
    functions.need(ggml.abort, "ggml_abort");
    functions.want(ggml.version, "ggml_version");
    functions.want(ggml.commit, "ggml_commit");
}

} // namespace

LlamaApi find_llama(const char *wanted) {
    const auto chosen = choose_llama(wanted);
    LlamaApi api;
    api.path = chosen.path;
    api.base = chosen.base;
    const Functions functions{open_loaded(api.path), api.path};
    find_functions(functions, api);
    find_functions(functions, api.ggml);
    return api; // the handle is kept: the functions must stay where they are
}

} // namespace kvf

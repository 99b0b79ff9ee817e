/* A libllama from before llama_state_seq_get_data_ext, as far as kvferry looks at one. */
int llama_decode(void *context, int batch) {
    (void)context;
    return batch;
}

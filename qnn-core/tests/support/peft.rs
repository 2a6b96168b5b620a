//! Small PEFT directories.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use qnn_core::offline::lora::PREFIX;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// A tensor of an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) values: Vec<f32>,
}

/// A config as PEFT writes it, with `changes` on top.
pub(crate) fn config(changes: Value) -> Value {
    let mut config = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": "tiny", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
        "loftq_config": {}, "lora_alpha": 6, "lora_bias": false, "lora_dropout": 0.1, "megatron_config": null,
        "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA", "peft_version": "0.19.1",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": null, "target_modules": ["v_proj", "q_proj"],
        "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_dora": false,
        "use_qalora": false, "use_rslora": false,
    });
    let own = config.as_object_mut().expect("it is one");
    own.extend(changes.as_object().expect("changes are an object").clone());
    config
}

/// A and B of `module`, `[rank, k]` and `[n, rank]`, with values that `value` gives for (is B, index).
pub(crate) fn pair(
    module: &str,
    [n, k, rank]: [usize; 3],
    dtype: Dtype,
    value: &mut dyn FnMut(bool, usize) -> f32,
) -> Vec<Stored> {
    let mut stored = |half: &str, shape: [usize; 2], is_b| Stored {
        name: format!("{PREFIX}{module}.{half}.weight"),
        shape: shape.to_vec(),
        dtype,
        values: (0..shape[0] * shape[1]).map(|i| value(is_b, i)).collect(),
    };
    vec![stored("lora_A", [rank, k], false), stored("lora_B", [n, rank], true)]
}

/// Writes a PEFT directory called `name` in `parent`.
pub(crate) fn write(parent: &Path, name: &str, config: &Value, tensors: &[Stored]) -> PathBuf {
    let dir = parent.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> = tensors.iter().map(bytes_of).collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), bytes).expect("the bytes fit the shape");
        (tensor.name.clone(), view)
    });
    let file = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
    dir
}

fn bytes_of(tensor: &Stored) -> Vec<u8> {
    let values = tensor.values.iter();
    match tensor.dtype {
        Dtype::F16 => values.flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::I32 => values.flat_map(|v| (*v as i32).to_le_bytes()).collect(),
        _ => values.flat_map(|v| v.to_le_bytes()).collect(),
    }
}

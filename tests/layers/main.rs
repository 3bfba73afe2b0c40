//! The layers one by one: values, gradients, edges, statistics, and what they say.

mod activation;
mod add_norm;
mod affine_bias;
mod changed_inputs;
mod conv1d;
mod edges;
mod folding;
mod functions;
mod gated_rms_norm;
mod gradcheck;
mod gradient_flow;
mod launches;
mod layer_gradients;
mod masked;
mod modulation;
mod properties;
mod recalibration;
mod running_stats;
mod second_family;
mod second_order;
mod sizes;
mod switch_norm;
mod table;
mod weight_norm_start;
mod weights;

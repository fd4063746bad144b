//! What a user can see, and comparisons with other implementations.

mod backbones;
mod bias;
mod card;
mod cli;
mod contract;
mod convert;
mod data;
mod data_engine;
mod evaluate;
mod finetune;
mod foreign;
mod gpu;
mod hopper;
mod hub;
mod init;
mod kernels;
mod launch;
mod model;
mod nccl;
mod order;
mod plan;
mod ranks;
mod ranks_gpu;
mod recipes;
mod reference;
mod report;
mod robust;
mod run;
mod settings;
mod sources;
mod support;
mod survive;
mod terminal;
mod tidy;
mod variants;

#[path = "contracts.rs"]
mod launch_contracts;

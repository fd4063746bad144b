//! What a user can see, and comparisons with other implementations.

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
mod hub;
mod init;
mod kernels;
mod model;
mod order;
mod ranks;
mod recipes;
mod reference;
mod robust;
mod run;
mod sources;
mod support;
mod terminal;
mod tidy;
mod variants;

#[path = "contracts.rs"]
mod launch_contracts;

pub const BUILT_IN: [&str; 0] = [];
pub struct Override;

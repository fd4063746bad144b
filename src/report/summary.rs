//! The closing summary of a run: its results, where its files are, and what to type next.

use super::Log;

/// Collects facts and commands, then prints them in two aligned blocks.
#[derive(Default)]
pub struct Summary {
    title: String,
    facts: Vec<(String, String)>,
    next: Vec<(String, String)>,
}

impl Summary {
    /// `title`: `trained 1770 steps in 1 min 32 s`
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), ..Self::default() }
    }

    /// `validation`, `94.1 % top-1 at step 1770`
    pub fn fact(mut self, name: &str, value: impl Into<String>) -> Self {
        self.facts.push((name.into(), value.into()));
        self
    }

    /// Adds a command that works when typed, and what it does.
    pub fn next(mut self, what: &str, command: impl Into<String>) -> Self {
        self.next.push((what.into(), command.into()));
        self
    }

    pub fn print(&self, log: &Log) {
        log.line("");
        self.text().lines().for_each(|line| log.line(line));
    }

    fn text(&self) -> String {
        let block = |rows: &[(String, String)]| {
            let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
            rows.iter().map(|(name, value)| format!("  {name:<width$}   {value}\n")).collect::<String>()
        };
        let mut text = format!("{}\n{}", self.title, block(&self.facts));
        if !self.next.is_empty() {
            text += &format!("\nnext\n{}", block(&self.next));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_in_one_column() {
        let summary = Summary::new("trained 60 steps")
            .fact("validation", "40.0 % top-1")
            .fact("best", "runs/x")
            .next("measure it", "vitrum eval --weights runs/x --data demo");
        let expected = "trained 60 steps\n  validation   40.0 % top-1\n  best         runs/x\n\nnext\n  \
                        measure it   vitrum eval --weights runs/x --data demo\n";
        assert_eq!(summary.text(), expected);
    }
}

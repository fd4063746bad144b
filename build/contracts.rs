//! Reads the contract of every kernel's launch from `kernels/`: the struct that it takes, its launch bounds, and
//! the numbers that its instance was made with.
//!
//! The sources are the only place where these are written. [`Contracts::rust`] makes the structs and the table
//! for `src/backend/cuda/launch.rs`, [`Contracts::asserts`] makes assertions for the CUDA compiler: both sides
//! check the same sizes and offsets. The reader knows just the C++ that the kernels use for this, and refuses
//! the rest: structs of numbers, pointers, arrays, `View`s and other structs; macros whose arguments are names
//! and numbers.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A source: its file name and its text.
type Source = (String, String);

pub(crate) struct Contracts {
    structs: BTreeMap<String, Struct>,
    pub(crate) kernels: Vec<Kernel>,
}

/// One instance of a kernel.
pub(crate) struct Kernel {
    /// File name of its source.
    pub(crate) file: String,
    pub(crate) name: String,
    /// The struct that it takes, as written: `PoolArgs<bf16>`.
    args: String,
    threads: u32,
    blocks: u32,
    /// Declared with `HOT_KERNEL`.
    pub(crate) hot: bool,
    /// The numbers among the arguments of the macros that made the instance.
    constants: Vec<(String, u32)>,
}

struct Struct {
    file: String,
    fields: Vec<Field>,
    size: usize,
    align: usize,
}

struct Field {
    name: String,
    rust: String,
    /// The struct that a pointer leads to, or that the field is.
    leads_to: Option<String>,
    offset: usize,
}

/// `View` of `kernels/types.cuh`, written by hand on the Rust side: a pointer and three words.
const VIEW: &str = "View";
const VIEW_LAYOUT: [(&str, usize); 4] = [("at", 0), ("ld", 8), ("rows", 12), ("cols", 16)];
const VIEW_SIZE: usize = 24;

/// `TensorMap` of `kernels/hopper.cuh`, likewise: 128 opaque bytes.
const TENSOR_MAP: &str = "TensorMap";
const TENSOR_MAP_SIZE: usize = 128;
const TENSOR_MAP_ALIGN: usize = 64;

impl Contracts {
    /// # Errors
    /// What cannot be read, with its file.
    pub(crate) fn read(sources: &[Source]) -> Result<Self, String> {
        let mut texts = BTreeMap::new();
        for (file, text) in sources {
            for (name, body) in structs_of(&plain(text)) {
                texts.insert(name, (file.clone(), body));
            }
        }
        let mut kernels = Vec::new();
        for (file, text) in sources.iter().filter(|(file, _)| file.ends_with(".cu")) {
            let (macros, tokens) = macros_of(&plain(text));
            let mut reader = Reader { file, macros: &macros, kernels: &mut kernels };
            reader.scan(&tokens, &[]).map_err(|why| format!("kernels/{file}: {why}"))?;
        }
        let mut contracts = Self { structs: BTreeMap::new(), kernels };
        for name in contracts.kernels.iter().map(|k| base(&k.args).to_owned()).collect::<Vec<_>>() {
            contracts.lay_out(&name, &texts)?;
        }
        Ok(contracts)
    }

    /// Lays out a struct and those that it contains or points to.
    fn lay_out(&mut self, name: &str, texts: &BTreeMap<String, (String, String)>) -> Result<(), String> {
        if name == VIEW || self.structs.contains_key(name) {
            return Ok(());
        }
        let (file, body) =
            texts.get(name).ok_or(format!("struct `{name}` of a kernel's arguments is not found"))?;
        let fail = |why: String| format!("kernels/{file}: struct `{name}`: {why}");
        let mut made = Struct { file: file.clone(), fields: Vec::new(), size: 0, align: 1 };
        for declaration in body.split(';') {
            let tokens = tokens(declaration);
            if tokens.is_empty() {
                continue;
            }
            let declared = Declaration::read(&tokens).map_err(fail)?;
            let is_struct = |name: &str| texts.contains_key(name);
            let (rust, size, align, leads_to) = if declared.pointer {
                let leads_to = is_struct(&declared.base).then(|| declared.base.clone());
                if let Some(to) = &leads_to {
                    self.lay_out(to, texts)?;
                }
                ("Address".to_owned(), 8, 8, leads_to)
            } else if declared.base == VIEW {
                (VIEW.to_owned(), VIEW_SIZE, 8, None)
            } else if declared.base == TENSOR_MAP {
                (TENSOR_MAP.to_owned(), TENSOR_MAP_SIZE, TENSOR_MAP_ALIGN, None)
            } else if let Some((rust, size)) = primitive(&declared.base) {
                (rust.to_owned(), size, size, None)
            } else if is_struct(&declared.base) {
                self.lay_out(&declared.base, texts)?;
                let inner = &self.structs[&declared.base];
                (declared.base.clone(), inner.size, inner.align, Some(declared.base.clone()))
            } else {
                return Err(fail(format!("no counterpart of type `{}` is known", declared.base)));
            };
            for (name, count) in declared.names {
                let offset = made.size.next_multiple_of(align);
                made.size = offset + size * count.unwrap_or(1);
                made.align = made.align.max(align);
                let rust = count.map_or(rust.clone(), |count| format!("[{rust}; {count}]"));
                made.fields.push(Field { name, rust, leads_to: leads_to.clone(), offset });
            }
        }
        made.size = made.size.next_multiple_of(made.align);
        self.structs.insert(name.to_owned(), made);
        Ok(())
    }

    /// Structs that lie in device memory, where the host reads or writes them as bytes.
    fn in_memory(&self) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        let fields = self.structs.values().flat_map(|s| &s.fields);
        let mut next: Vec<&str> =
            fields.filter(|f| f.rust == "Address").filter_map(|f| f.leads_to.as_deref()).collect();
        while let Some(name) = next.pop() {
            if !found.contains(&name) {
                found.push(name);
                next.extend(self.structs[name].fields.iter().filter_map(|f| f.leads_to.as_deref()));
            }
        }
        found
    }

    /// The structs, and the table of kernels.
    pub(crate) fn rust(&self) -> String {
        let in_memory = self.in_memory();
        let mut text = String::new();
        for (name, s) in &self.structs {
            let bytes = if in_memory.contains(&name.as_str()) {
                ", Default, bytemuck::Pod, bytemuck::Zeroable"
            } else {
                ""
            };
            writeln!(text, "/// `{name}` of `kernels/{}`.", s.file).unwrap();
            writeln!(text, "#[derive(Clone, Copy, Debug, PartialEq{bytes})]\n#[repr(C)]").unwrap();
            writeln!(text, "pub(super) struct {name} {{").unwrap();
            for field in &s.fields {
                writeln!(text, "    pub(super) {}: {},", field.name, field.rust).unwrap();
            }
            writeln!(text, "}}\nconst _: () = assert!(size_of::<{name}>() == {});", s.size).unwrap();
            for field in &s.fields {
                let Field { name: field, offset, .. } = field;
                writeln!(text, "const _: () = assert!(std::mem::offset_of!({name}, {field}) == {offset});")
                    .unwrap();
            }
        }
        let mut taken: Vec<&str> = self.kernels.iter().map(|k| base(&k.args)).collect();
        taken.sort_unstable();
        taken.dedup();
        for name in taken {
            writeln!(text, "// SAFETY: the layout asserted above is the kernels'.").unwrap();
            writeln!(text, "unsafe impl Args for {name} {{ const NAME: &'static str = {name:?}; }}").unwrap();
        }
        writeln!(text, "const CONTRACTS: &[Contract] = &[").unwrap();
        for Kernel { name, args, threads, blocks, constants, .. } in &self.kernels {
            let args = base(args);
            writeln!(
                text,
                "    Contract {{ name: {name:?}, args: {args:?}, threads: {threads}, blocks: {blocks}, constants: &{constants:?} }},"
            )
            .unwrap();
        }
        text + "];\n"
    }

    /// Assertions on the structs that the kernels of a file take, for the end of that file.
    pub(crate) fn asserts(&self, file: &str) -> String {
        let mut text = String::from("namespace {\n");
        let mut types: Vec<&str> =
            self.kernels.iter().filter(|k| k.file == file).map(|k| k.args.as_str()).collect();
        types.sort_unstable();
        types.dedup();
        let mut number = 0;
        let mut assert = |written: &str, size: usize, fields: &mut dyn Iterator<Item = (&str, usize)>| {
            number += 1;
            writeln!(text, "using Contract{number} = {written};").unwrap();
            writeln!(text, "static_assert(sizeof(Contract{number}) == {size}, \"size of {written}\");")
                .unwrap();
            for (field, offset) in fields {
                writeln!(
                    text,
                    "static_assert(__builtin_offsetof(Contract{number}, {field}) == {offset}, \"{field} of {written}\");"
                )
                .unwrap();
            }
        };
        let mut inner = Vec::new();
        for written in types {
            let s = &self.structs[base(written)];
            assert(written, s.size, &mut s.fields.iter().map(|f| (f.name.as_str(), f.offset)));
            inner.extend(s.fields.iter().filter_map(|f| f.leads_to.as_deref()));
            if s.fields.iter().any(|f| f.rust == VIEW) {
                inner.push(VIEW);
            }
        }
        let mut done: Vec<&str> = Vec::new();
        while let Some(name) = inner.pop() {
            if done.contains(&name) {
                continue;
            }
            done.push(name);
            if name == VIEW {
                assert("View<float>", VIEW_SIZE, &mut VIEW_LAYOUT.into_iter());
                continue;
            }
            let s = &self.structs[name];
            assert(name, s.size, &mut s.fields.iter().map(|f| (f.name.as_str(), f.offset)));
            inner.extend(s.fields.iter().filter_map(|f| f.leads_to.as_deref()));
        }
        text + "}  // namespace\n"
    }
}

/// A member of a struct: `const T* a`, `u32 a, b`, `float a[3]`, `View<const T> a`.
struct Declaration {
    base: String,
    pointer: bool,
    names: Vec<(String, Option<usize>)>,
}

impl Declaration {
    fn read(tokens: &[String]) -> Result<Self, String> {
        let written = tokens.join(" ");
        let refused = || format!("`{written}` is not a member that the build can read");
        let mut rest = tokens;
        if rest[0] == "const" {
            rest = &rest[1..];
        }
        let base = rest.first().filter(|t| is_name(t)).ok_or_else(refused)?.clone();
        rest = &rest[1..];
        if rest.first().is_some_and(|t| t == "<") {
            let end = rest.iter().position(|t| t == ">").ok_or_else(refused)?;
            rest = &rest[end + 1..];
        }
        let pointer = rest.first().is_some_and(|t| t == "*");
        if pointer {
            rest = &rest[1..];
        }
        let mut names = Vec::new();
        for one in rest.split(|t| t == ",") {
            match one {
                [name] if is_name(name) => names.push((name.clone(), None)),
                [name, open, count, close] if is_name(name) && open == "[" && close == "]" => {
                    names.push((name.clone(), Some(count.parse().map_err(|_| refused())?)));
                }
                _ => return Err(refused()),
            }
        }
        Ok(Self { base, pointer, names })
    }
}

/// The Rust name of a number, and its size.
fn primitive(name: &str) -> Option<(&'static str, usize)> {
    Some(match name {
        "u8" => ("u8", 1),
        "u16" => ("u16", 2),
        "u32" => ("u32", 4),
        "i32" => ("i32", 4),
        "u64" => ("u64", 8),
        "float" => ("f32", 4),
        "double" => ("f64", 8),
        _ => return None,
    })
}

/// `PoolArgs` of `PoolArgs<bf16>`.
fn base(args: &str) -> &str {
    args.split('<').next().unwrap_or(args)
}

/// Expands macros and collects the kernels that they declare.
struct Reader<'a> {
    file: &'a str,
    macros: &'a BTreeMap<String, Macro>,
    kernels: &'a mut Vec<Kernel>,
}

struct Macro {
    parameters: Vec<String>,
    body: Vec<String>,
}

impl Reader<'_> {
    fn scan(&mut self, tokens: &[String], constants: &[(String, u32)]) -> Result<(), String> {
        let mut at = 0;
        while at < tokens.len() {
            let word = tokens[at].as_str();
            at += 1;
            let hot = word == "HOT_KERNEL";
            if hot || word == "KERNEL" {
                let (declared, end) = arguments(tokens, at)?;
                let [name, threads, blocks] = <[Vec<String>; 3]>::try_from(declared)
                    .map_err(|_| format!("{word} takes a name, threads and blocks"))?;
                let name = name.concat();
                let takes =
                    [vec!["ARGS".to_owned()], tokens.get(end + 2..).unwrap_or_default().to_vec()].concat();
                if tokens.get(end).is_none_or(|t| t != "(") || tokens.get(end + 1).is_none_or(|t| t != "ARGS")
                {
                    return Err(format!("kernel `{name}` does not take `(ARGS(a struct))`"));
                }
                let (args, _) = arguments(&takes, 1)?;
                let args: Vec<String> = args.iter().map(|part| part.join(" ")).collect();
                self.kernels.push(Kernel {
                    file: self.file.to_owned(),
                    args: args.join(", ").replace(" <", "<").replace("< ", "<").replace(" >", ">"),
                    threads: product(&threads).ok_or(format!("threads of kernel `{name}`"))?,
                    blocks: product(&blocks).ok_or(format!("blocks of kernel `{name}`"))?,
                    name,
                    hot,
                    constants: constants.to_vec(),
                });
                at = end;
            } else if let Some(expands) = self.macros.get(word)
                && tokens.get(at).is_some_and(|t| t == "(")
            {
                let (given, end) = arguments(tokens, at)?;
                if given.len() != expands.parameters.len() {
                    return Err(format!("`{word}` takes {} arguments", expands.parameters.len()));
                }
                let mut known = constants.to_vec();
                for (parameter, value) in expands.parameters.iter().zip(&given) {
                    known.extend(product(value).map(|number| (parameter.clone(), number)));
                }
                self.scan(&expands.with(&given), &known)?;
                at = end;
            }
        }
        Ok(())
    }
}

impl Macro {
    /// The body with its parameters replaced, and `a##b` pasted.
    fn with(&self, given: &[Vec<String>]) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        let mut paste = false;
        for token in &self.body {
            if token == "##" {
                paste = true;
                continue;
            }
            let place = self.parameters.iter().position(|p| p == token);
            let put = place.map_or(vec![token.clone()], |place| given[place].clone());
            for (i, token) in put.into_iter().enumerate() {
                match out.last_mut() {
                    Some(last) if paste && i == 0 => last.push_str(&token),
                    _ => out.push(token),
                }
            }
            paste = false;
        }
        out
    }
}

/// The arguments in the parentheses that open at `at`, and the place after them.
fn arguments(tokens: &[String], at: usize) -> Result<(Vec<Vec<String>>, usize), String> {
    if tokens.get(at).is_none_or(|t| t != "(") {
        return Err(format!("no parenthesis after `{}`", tokens[at - 1]));
    }
    let (mut depth, mut found) = (0, vec![Vec::new()]);
    for (i, token) in tokens.iter().enumerate().skip(at) {
        match token.as_str() {
            "(" if depth == 0 => depth = 1,
            ")" if depth == 1 => return Ok((found, i + 1)),
            "," if depth == 1 => found.push(Vec::new()),
            other => {
                depth += i32::from(other == "(") - i32::from(other == ")");
                found.last_mut().expect("never empty").push(token.clone());
            }
        }
    }
    Err("a parenthesis does not close".to_owned())
}

/// The value of `32 * 4`.
fn product(tokens: &[String]) -> Option<u32> {
    tokens
        .split(|t| t == "*")
        .map(|factor| match factor {
            [number] => number.parse::<u32>().ok(),
            _ => None,
        })
        .product()
}

/// A source without comments, its continued lines joined.
fn plain(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    lines.fold(String::new(), |mut plain, line| {
        match line.strip_suffix('\\') {
            Some(continued) => plain.push_str(continued),
            None => {
                plain.push_str(line);
                plain.push('\n');
            }
        }
        plain
    })
}

/// The structs that a source declares at the start of a line: name and body.
fn structs_of(plain: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for part in format!("\n{plain}").split("\nstruct ").skip(1) {
        let Some((name, rest)) = part.split_once(" {\n") else { continue };
        let Some((body, _)) = rest.split_once("\n};") else { continue };
        if is_name(name) {
            found.push((name.to_owned(), body.to_owned()));
        }
    }
    found
}

/// The function-like macros of a source, and the tokens of everything else.
fn macros_of(plain: &str) -> (BTreeMap<String, Macro>, Vec<String>) {
    let (mut macros, mut rest) = (BTreeMap::new(), Vec::new());
    for line in plain.lines() {
        let Some(directive) = line.strip_prefix('#') else {
            rest.extend(tokens(line));
            continue;
        };
        let define = directive.strip_prefix("define ").and_then(|define| define.split_once('('));
        if let Some((name, after)) = define
            && is_name(name)
            && let Some((parameters, body)) = after.split_once(')')
        {
            let parameters = parameters.split(',').map(|p| p.trim().to_owned()).collect();
            macros.insert(name.to_owned(), Macro { parameters, body: tokens(body) });
        }
    }
    (macros, rest)
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && token.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Names, numbers, `##`, and single characters.
fn tokens(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut within = false;
    for c in text.chars() {
        let word = c.is_ascii_alphanumeric() || c == '_';
        match found.last_mut() {
            Some(last) if within && word => last.push(c),
            Some(last) if c == '#' && last == "#" => last.push(c),
            _ if c.is_whitespace() => {}
            _ => found.push(c.to_string()),
        }
        within = word;
    }
    found
}

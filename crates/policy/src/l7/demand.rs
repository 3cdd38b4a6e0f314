use super::{HttpRule, NamePattern};
use crate::{
    compile::{CompiledPolicy, RuleInfo, RuleSource},
    model::{Action, Application},
};

/// What the rules of one end ask of a connection, all that match it taken together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Nothing passes: a rule denies it, or (`None`) no rule allows it.
    Deny(Option<RuleSource>),
    /// Everything passes, whatever is inside.
    Pass(RuleSource),
    /// It is HTTP, and the requests pass that one of these rules admits; their numbers grow, and
    /// [`CompiledPolicy::http_rules`] tell what each of them admits.
    Http(Vec<(RuleSource, u32)>),
    /// It is DNS, and questions for these names pass.
    Dns(Vec<(RuleSource, NamePattern)>),
    /// It is TLS, and connections to these server names pass.
    Tls(Vec<(RuleSource, NamePattern)>),
}

impl CompiledPolicy {
    /// What the rules ask of a connection with a peer (its identity and the number of its policy
    /// prefix, 0 if none).
    ///
    /// A deny decides. Rules that allow add up: one that asks nothing lets everything pass, still
    /// as what the first of the others says it is. It has to speak of exactly this port, or of no
    /// port at all: a range that contains the port among others opens nothing that a rule for the
    /// port closes. Names are more careful: for DNS the port has to be named, and a server name
    /// has to be given as soon as one rule asks for it.
    #[must_use]
    pub fn demand(&self, identity: u32, prefix: u32, protocol: u8, port: u16) -> Demand {
        let rules: Vec<(u32, &RuleInfo)> = self
            .matching(identity, prefix, protocol, port)
            .filter_map(|number| Some((number, self.rule(number)?)))
            .collect();
        let Some((_, first)) = rules.first() else { return Demand::Deny(None) };
        let source = first.source.clone();
        if first.action == Action::Deny {
            return Demand::Deny(Some(source));
        }
        let named = |rule: &RuleInfo| rule.ports.names(protocol, port);
        let widens = |rule: &RuleInfo| named(rule) || rule.ports.is_every(protocol);
        match first.application {
            Application::Any => Demand::Pass(source),
            Application::Http(_) => Demand::Http(gather(&rules, |number, rule| {
                let admits = match rule.application {
                    Application::Http(_) => true,
                    Application::Any => widens(rule),
                    _ => false,
                };
                admits.then_some(number).into_iter().collect()
            })),
            Application::Dns(_) => Demand::Dns(gather(&rules, |_, rule| match &rule.application {
                Application::Dns(list) => list.clone(),
                Application::Any if named(rule) || rule.source == RuleSource::NoDefaultDeny => {
                    vec![NamePattern::everything()]
                }
                _ => Vec::new(),
            })),
            Application::Tls(_) => {
                // Without default deny, what is no TLS passes too.
                if rules.iter().any(|(_, rule)| rule.source == RuleSource::NoDefaultDeny) {
                    return Demand::Pass(RuleSource::NoDefaultDeny);
                }
                Demand::Tls(gather(&rules, |_, rule| match &rule.application {
                    Application::Tls(list) => list.clone(),
                    _ => Vec::new(),
                }))
            }
        }
    }

    /// What the rules admit of HTTP, in the order of their precedence: the number of each with what
    /// it asks of a request. One that asks nothing admits every request.
    #[must_use]
    pub fn http_rules(&self) -> Vec<(u32, HttpRule)> {
        let asks = |rule: &RuleInfo| match &rule.application {
            Application::Http(list) => list.clone(),
            Application::Any if rule.action == Action::Allow => vec![HttpRule::default()],
            _ => Vec::new(),
        };
        let rules = (0u32..).zip(&self.rules);
        rules.flat_map(|(n, rule)| asks(rule).into_iter().map(move |ask| (n, ask))).collect()
    }
}

fn gather<T>(
    rules: &[(u32, &RuleInfo)],
    asks: impl Fn(u32, &RuleInfo) -> Vec<T>,
) -> Vec<(RuleSource, T)> {
    let asks = |(number, rule): &(u32, &RuleInfo)| {
        asks(*number, rule).into_iter().map(|what| (rule.source.clone(), what)).collect::<Vec<_>>()
    };
    rules.iter().flat_map(asks).collect()
}

import json
print(json.dumps({"ratio":None,"gossipfl_gib_s":None,"best_gib_s":None,"best":None}))
